-- Begins a new epoch where the one that is there can't be trusted: it lived on another run of the server (a restart
-- with an older state, a replica that took over, a slot that moved here), or in a cache of another number of shards,
-- or the clock has gone back. What was acknowledged since may be missing there, and nothing else would show it.
-- KEYS  1 clock  2 marks  3 globs  4 todo
-- ARGV  1 epoch to begin  2 how long what is to be done is kept, ms  3 an epoch the caller has seen
--       4 how far its clock had got then
-- returns the clock, `<epoch>.<seq>`, or nil if there is none: whoever writes next begins an epoch
-- flags: allow-oom
-- include: clock todo

local epoch, seq, value = known_clock(KEYS[1])
if not epoch then
  return false
end

local function is_another(member, id)
  return id ~= 0 and tonumber(redis.call('ZSCORE', KEYS[2], member) or '0') ~= id
end

local shards = tonumber(string.match(ARGV[1], '#(%d+)$'))
local seen = epoch == ARGV[3] and tonumber(ARGV[4]) or 0
if seq >= seen and not is_another('@', this_run()) and not is_another('#', shards) then
  return value
end
seq = next_seq(KEYS[2], math.max(seq, seen))
redis.call('UNLINK', KEYS[2], KEYS[3])
promise(KEYS[4], {'sweep'}, ARGV[2])
return write_clock(KEYS[1], KEYS[2], begin_epoch(KEYS[2], ARGV[1], seq), seq)
