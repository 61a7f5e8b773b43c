-- Begins a new epoch: every entry, and every load under way, of an earlier one is dead.
-- KEYS  1 clock  2 marks  3 globs  4 todo
-- ARGV  1 epoch to begin  2 how long the work that follows is kept, ms
-- returns the new clock, `<epoch>.<seq>`
-- flags: allow-oom
-- include: clock todo

local epoch, seq, value = known_clock(KEYS[1])
local name = string.match(ARGV[1], '^%w+')
if epoch and string.sub(epoch, 1, #name) == name then
  return value -- this command has arrived twice, and has already begun the epoch
end
seq = next_seq(KEYS[2], seq)
redis.call('UNLINK', KEYS[2], KEYS[3])
promise(KEYS[4], {'sweep'}, ARGV[2])
return write_clock(KEYS[1], KEYS[2], begin_epoch(KEYS[2], ARGV[1], seq), seq)
