"""Maps jobs onto machines. Imports neither longctx nor parallel, and never torch."""
