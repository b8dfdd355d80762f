"""The commands of ``ftfast``: each module has ``add_arguments(parser)`` and ``run(arguments)``."""
