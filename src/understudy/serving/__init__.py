"""A teacher behind HTTP: the client with its protocols, and the server of `understudy serve`."""
