-- Begins a new epoch where the present one can't be trusted: it lived on another run of the server (a restart
-- with an older state, a replica that took over, a slot that moved here), or in a cache of another number of shards,
-- or the clock has gone back. Invalidations that were acknowledged since may be missing there,
-- and nothing else would show it.
--
-- A replica that took over may go on with the epoch if every process had waited until a replica had its invalidation.
-- A server is such a replica if its history continues that of the server before, and if it has copied the end of that
-- history itself: a server started with an older state tells the same history, and has no byte of it in its backlog.
--
-- Every process asks before its first read, and mostly nothing is written. For want of flags: see agree.
-- KEYS  1 clock  2 marks  3 globs  4 todo
-- ARGV  1 epoch to begin  2 how long the work that follows is kept, ms  3 how far the clock had got when the
--       caller saw it last
-- returns the clock, `<epoch>.<seq>`, or nil if there is none: the next write begins an epoch
-- include: clock todo

local epoch, seq, value = known_clock(KEYS[1])
if not epoch then
  return false
end

local function noted(member)
  return tonumber(redis.call('ZSCORE', KEYS[2], member) or '0')
end

local function is_another(member, id)
  return id ~= 0 and noted(member) ~= id
end

local function is_heir()
  local said = info('replication')
  local taken_over = tonumber(string.match(said, 'second_repl_offset:(%d+)') or '0')
  local copied_from = tonumber(string.match(said, 'repl_backlog_first_byte_offset:(%d+)') or '0')
  local before = short_id(said, 'master_replid2')
  return before ~= 0 and before == noted('&') and copied_from > 0 and copied_from < taken_over
end

local shards, heritable = string.match(ARGV[1], '#(%d+)(%+?)$')
-- Also in another epoch: another primary may have come and gone, of which this one has not heard.
local seen = tonumber(ARGV[3])
local is_whole = seq >= seen and not is_another('#', tonumber(shards))
local is_here = not is_another('@', this_run())
if is_whole and (is_here or heritable == '+' and is_heir()) then
  if not is_here or (heritable == '+') ~= (noted('&') ~= 0) then
    redis.call('ZREM', KEYS[2], '') -- no such member exists; the first write takes no memory: see session_sweep
    settle_epoch(KEYS[2], heritable == '+')
  end
  return value
end
seq = next_seq(KEYS[2], math.max(seq, seen))
redis.call('UNLINK', KEYS[2], KEYS[3])
promise(KEYS[4], {'sweep'}, ARGV[2])
return write_clock(KEYS[1], KEYS[2], begin_epoch(KEYS[2], ARGV[1], seq), seq)
