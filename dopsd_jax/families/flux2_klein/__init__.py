"""FLUX.2-klein (4B and 9B): text to image, and the editing branch as the teacher's context."""
