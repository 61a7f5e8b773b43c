-- Begins a new epoch: everything stored, or being loaded, in another is dead.
-- KEYS  1 clock  2 marks  3 globs
-- ARGV  1 epoch to begin
-- returns the new clock, `<epoch>.<seq>`
-- include: clock

local _, seq = next_moment(KEYS[1], KEYS[2], ARGV[1])
redis.call('UNLINK', KEYS[2], KEYS[3])
return write_clock(KEYS[1], KEYS[2], ARGV[1], seq)
