"""The processes that train together: starting and watching them, collectives, and sharded weights."""
