"""Fable: a small world, lessons about it, and the little model that learns them.

    world ──► exchange · stories · facts · knowledge ──► lessons ──► vocabulary ──► train ──► GGUF
                                                            └──► evaluate ◄── refollama.load ◄──┘

Nothing is downloaded: every conversation comes from a seed.
"""
