"""The commands beside the server. Each is a file or a folder. Modules that several commands use are here as well."""
