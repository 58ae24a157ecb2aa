"""The two sizes that ops, caches and schedules must agree on.

No torch here, so that policies without torch can read them.
"""

CHUNK = (
    128  # chunks of the scan end at multiples of this absolute position, however a prompt was cut into calls
)
PAGE = 128  # tokens per page of keys and values, by default
