"""The miniature's FLUX.2-klein: pictures in context are latent tokens, and can be edited."""
