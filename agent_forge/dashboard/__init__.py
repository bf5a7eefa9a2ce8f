"""The session report: reads the store and the events, draws one page. Imports nothing that trains; removable."""
