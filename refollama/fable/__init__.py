"""Fable: a small world, lessons about it, and the little models that learn them.

    world ──► exchange · stories · facts · knowledge ──► lessons ──► vocabulary ──► train ──► GGUF
      └─────► drawings ──► seeing ──────────────────────────┴──────► vision ──► GGUF, twice
                                                            └──► evaluate ◄── refollama.load ◄──┘

Nothing is downloaded: every conversation and every picture comes from a seed.
"""
