"""Go's text/template in five steps: lexer → parser (literals) → nodes (functions, fmt).

`refollama.text.template.Template` is the door; nobody else comes in here.
"""
