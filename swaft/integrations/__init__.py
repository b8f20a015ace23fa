"""swaft inside other people's training: one module a project, imported only by those who use that project."""
