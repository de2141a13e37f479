"""Inference engines behind a seam of one method (`base.Segment.run`)."""
