-- Looks at sessions that are due, oldest first: deletes the expired, puts off those that were seen since.
-- KEYS  1 x
-- ARGV  1 prefix  2 most to look at
-- returns {{h, user … of the expired}, how many were due, how long the oldest had been, µs}
-- include: time session session_index

-- A server that is full refuses a script's first write if it takes memory, and only the first: so this one takes none.
redis.call('ZREM', KEYS[1], '')
local ended = {}
local due, lag = sweep(ARGV[1], now_us(), tonumber(ARGV[2]), ended)
return {ended, due, lag}
