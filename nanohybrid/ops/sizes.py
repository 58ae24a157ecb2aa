"""The two sizes that ops, pools and schedules must agree on. Without torch, so that pure policy can read them."""

CHUNK = 128  # recurrent chunks end at multiples of this absolute position, however a prompt was split
PAGE = 128  # tokens a page of keys and values holds by default
