"""The commands beside the server, each a file or a folder. Modules that several of them use are here as well."""
