"""Files of other tools: one module per format, and the tables of what each calls a layer."""
