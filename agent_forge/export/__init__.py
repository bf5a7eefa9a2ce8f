"""Models for other programs: one function per format, found by name. Importing this loads no torch.

An exporter takes an :class:`agent_forge.export.hf.ExportPlan`, or the plan class its first parameter is annotated with,
and ``show(done, total)``, writes the folder and returns what it wrote. Others enter by ``EXPORTERS.register`` or by an
entry point.
"""

from __future__ import annotations

from forgekit.registry import Registry

EXPORTERS = Registry("export_format")
EXPORTERS.lazy("hf", "agent_forge.export.hf:export_hf")
EXPORTERS.lazy("gguf", "agent_forge.export.gguf:export_gguf")
