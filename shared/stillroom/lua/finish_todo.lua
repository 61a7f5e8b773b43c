-- Crosses off work that a worker took. Work that was added again meanwhile has another due time, and stays.
-- KEYS  1 todo
-- ARGV  1 member  2 its due time when it was taken  3 what is left to do, or nothing  4 ms until that is due
-- returns 1 crossed off, 0 it was asked for again
-- flags: allow-oom
-- include: time

-- What is left is added first, as a set that is empty for a moment loses its end.
local ours = redis.call('ZSCORE', KEYS[1], ARGV[1]) == ARGV[2]
if ARGV[3] ~= '' then
  local due = plain(math.floor(now_us() / 1000) + tonumber(ARGV[4]))
  redis.call('ZADD', KEYS[1], ours and ARGV[3] == ARGV[1] and 'XX' or 'NX', due, ARGV[3])
end
if ours and ARGV[3] ~= ARGV[1] then
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return ours and 1 or 0
