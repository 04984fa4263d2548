"""The routes of the trainer, one file a subject; each is a thin adapter from HTTP to the room that does the work."""
