"""The processes that train together: starting and monitoring them, collectives, and sharded weights."""
