"""The embedded default: a task made by code and a teacher for it, which need no download."""
