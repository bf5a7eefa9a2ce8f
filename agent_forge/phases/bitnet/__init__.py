"""Phase 4: weights in three values."""
