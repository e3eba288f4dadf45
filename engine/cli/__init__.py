"""The command line, one module per verb: ``add_arguments(parser)`` declares its flags, ``run(args)`` does
it."""
