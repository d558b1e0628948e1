"""The world of the trained miniature of Z-Image-Turbo: pictures, captions, and their judge."""
