"""Checks of the data: findings about rows that are valid, but may teach something else than intended.

A check is one function; a new check is a new entry of a table. `rows` looks at a row as it was read and at a rendered
and tokenized sequence, `splits` at whole splits.
"""
