"""What a user writes: the typed TOML recipe, its checks, and the service specs that follow from it.

Nothing is started here and no placement is searched for: `asyncflow.run` resolves `placement = "auto"`.
"""
