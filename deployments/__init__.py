"""The connecting half of kvatlas: Ray Serve deployments around kvcore."""
