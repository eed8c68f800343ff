"""What a run will need and do on TPUs that are not here, by their own compiler's account.

`plans.compile_run` compiles a run's programs for a described topology; `costs` counts what a compiled program does,
`buffers` what fills its memory. The command is `jaxrl-post compile`.
"""
