"""Phase 3: prompt baking of the thinking strategies, then Quiet-STaR."""
