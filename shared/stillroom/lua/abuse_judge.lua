-- Logs a complete pattern once per window, and bans its subject if its rule bans. Both happen or neither: a worker may
-- be killed before or after, and the event is read again, but there is no second ban.
-- Where the cap or another ban prevents the ban, a later event of the window bans without a new line.
-- KEYS  1 seen  2 log of patterns; to ban also: 3 ban  4 level  5 lifted  6 bans  7 times of bans
-- ARGV  1 id of the event  2 its time by its id, ms  3 window, ms  4 how long `seen` is kept, ms  5 log's length
--       6 action  7 how many fields the log gets  8… their names and values
--       to ban also: subject, rule, first ban's ms, longest ban's ms, jitter (share of the ban), most bans a minute,
--       how long levels are kept, ms  how long a lifted subject is left in peace, ms
-- returns {'new', action, level, ban ms}: the pattern is logged
--         {'again', action, level, ban ms}: this event logged it before
--         {'late', 'ban', level, ban ms}: a ban without a line
--         {'known'}: the pattern was logged in this window
-- flags: allow-oom
-- include: time own ban

local MINUTE_MS = 60000
local now = math.floor(now_us() / 1000)
local id, at, window, action = ARGV[1], math.min(tonumber(ARGV[2]), now), tonumber(ARGV[3]), ARGV[6]
local level, ms = 0, 0

local function is_over_the_cap(most)
  local oldest = tonumber(redis.call('LINDEX', KEYS[7], most - 1) or '')
  return most == 0 or (oldest and oldest <= now and now - oldest < MINUTE_MS)
end

-- Returns when the ban of the subject was lifted, ms. A time from before the clock stepped back becomes now.
local function lifted_at()
  local lifted = tonumber(redis.call('GET', KEYS[5]) or '')
  if lifted and lifted > now then
    lifted = now
    redis.call('SET', KEYS[5], plain(now), 'KEEPTTL')
  end
  return lifted
end

local function try_to_ban(subject, rule, first, longest, jitter, most, level_ms, peace_ms)
  local lifted = lifted_at()
  if lifted and at <= lifted + tonumber(peace_ms) then
    return 'lifted'
  end
  level = tonumber(redis.call('GET', KEYS[4]) or '0') or 0
  if redis.call('PTTL', KEYS[3]) > 0 then
    return 'already' -- two rules may see the same attack: that is one ban, and one step up
  end
  if is_over_the_cap(tonumber(most)) then
    return 'capped'
  end
  ms = math.floor(math.min(tonumber(first) * 4 ^ level, tonumber(longest)) * (1 + tonumber(jitter)))
  write_ban(KEYS[3], KEYS[6], subject, now, ms, {rule = rule, level = level, by = 'rule', reason = ''})
  redis.call('SET', KEYS[4], plain(level + 1), 'PX', level_ms)
  redis.call('LPUSH', KEYS[7], plain(now))
  redis.call('LTRIM', KEYS[7], 0, tonumber(most) - 1)
  redis.call('PEXPIRE', KEYS[7], MINUTE_MS)
  return 'ban'
end

local function banning(outcome)
  return #KEYS > 2 and try_to_ban(unpack(ARGV, 8 + tonumber(ARGV[7]))) or outcome
end

-- Reads the pattern's record of this window: its event, the action, the time, until when another ban lasted, and the
-- event that banned later.
local function read_seen()
  local text = redis.call('GET', KEYS[1])
  local of, said, had, lasts, rest = string.match(text or '', '^([^\t]+)\t([^\t]+)\t(%d+)\t(%d+)(.*)$')
  if not of then
    return nil
  end
  local when, free, by = string.match(rest, '^\t(%d+)\t(%d+)\t(.*)$')
  return {
    of = of, said = said, level = tonumber(had), ms = tonumber(lasts),
    at = tonumber(when or string.match(of, '^%d+')) or 0, free = tonumber(free) or 0, by = by or '',
  }
end

local function write_seen(seen)
  local parts = {seen.of, seen.said, plain(seen.level), plain(seen.ms), plain(seen.at), plain(seen.free), seen.by}
  redis.call('SET', KEYS[1], table.concat(parts, '\t'), 'PX', ARGV[4])
end

-- Returns until when another ban of the subject lasts.
local function free_at(outcome)
  return outcome == 'already' and now + math.max(0, redis.call('PTTL', KEYS[3])) or 0
end

own(KEYS[1], 'string')
own(KEYS[2], 'stream')
for i = 3, #KEYS do
  own(KEYS[i], i == 6 and 'zset' or i == 7 and 'list' or 'string')
end
redis.call('PEXPIRE', KEYS[1], ARGV[4]) -- first: see abuse_count
local seen = read_seen()
if seen and seen.of == id then
  return {'again', seen.said, seen.level, seen.ms}
end
if seen and seen.at > now then -- from before the clock stepped back
  seen.free = math.max(0, seen.free - (seen.at - now))
  seen.at = now
  write_seen(seen)
  if #KEYS > 2 then
    lifted_at()
  end
end
if seen and at < seen.at + window then
  if seen.by == id then
    return {'late', 'ban', seen.level, seen.ms}
  end
  local may_ban = (seen.said == 'capped' or seen.said == 'already') and seen.by == '' and at >= seen.free
  local outcome = may_ban and banning()
  if outcome == 'ban' then
    seen.by, seen.level, seen.ms = id, level, ms
  elseif outcome then
    seen.free = free_at(outcome)
  end
  if outcome then
    write_seen(seen)
  end
  return outcome == 'ban' and {'late', 'ban', level, ms} or {'known'}
end

local fields = {}
for i = 8, 7 + tonumber(ARGV[7]) do
  fields[#fields + 1] = ARGV[i]
end
action = banning(action)
write_seen({of = id, said = action, level = level, ms = ms, at = at, free = free_at(action), by = ''})
local outcome = {'action', action, 'level', plain(level), 'ban_seconds', plain(ms / 1000)}
for _, part in ipairs(outcome) do
  fields[#fields + 1] = part
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', unpack(fields))
return {'new', action, level, ms}
