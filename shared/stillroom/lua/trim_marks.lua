-- Drops the marks that are older than any entry can be: see lib/marks.lua.
-- KEYS  1 clock  2 marks  3 globs
-- ARGV  1 age µs: the longest life of an entry and of the load before it  2 most marks to drop in one call
-- returns {marks dropped, marks left}
-- flags: allow-oom
-- include: clock marks

local epoch = known_clock(KEYS[1])
local newest = epoch and redis.call('ZSCORE', KEYS[2], '~' .. epoch)
local dropped = 0
if newest then
  dropped = drop_old_marks(epoch, tonumber(newest), KEYS[2], KEYS[3], tonumber(ARGV[1]), tonumber(ARGV[2]))
end
return {dropped, redis.call('ZCARD', KEYS[2])}
