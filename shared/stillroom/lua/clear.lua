-- Begins a new epoch: everything stored, or being loaded, in another is dead.
-- KEYS  1 clock  2 marks  3 globs  4 todo
-- ARGV  1 epoch to begin  2 how long what is to be done is kept, ms
-- returns the new clock, `<epoch>.<seq>`
-- flags: allow-oom
-- include: clock todo

local _, seq = next_moment(KEYS[1], KEYS[2], ARGV[1])
redis.call('UNLINK', KEYS[2], KEYS[3])
promise(KEYS[4], {'sweep'}, ARGV[2])
return write_clock(KEYS[1], KEYS[2], ARGV[1], seq)
