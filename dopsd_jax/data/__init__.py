"""Data sets: rows, images, buckets, batches, cached features. Knows no model."""
