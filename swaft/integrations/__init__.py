"""swaft inside other training frameworks: one module per framework, imported only by its users."""
