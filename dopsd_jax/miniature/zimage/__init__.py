"""The miniature's Z-Image: pictures in context are seen through the vision tower."""
