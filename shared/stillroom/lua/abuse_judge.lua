-- A pattern is complete: says so once per window, and bans whom it is about if that is what its rule does. All of it
-- or nothing: a worker may be killed before or after, and the event is read again, but there is no second ban.
-- KEYS  1 seen  2 log of patterns; to ban also: 3 ban  4 level  5 lifted  6 bans  7 times of bans
-- ARGV  1 id of the event  2 its time, ms  3 window, ms  4 how long `seen` is kept, ms  5 log's length  6 action
--       7 how many fields the log gets  8… their names and values
--       to ban also: subject, rule, first ban's ms, longest ban's ms, jitter (share of the ban), most bans a minute,
--       how long levels are kept, ms  how long a lifted subject is left in peace, ms
-- returns {'new' or 'again' (this event has said so before), action, level, ban ms}, or {'known'} in this window
-- flags: allow-oom
-- include: clock ban

local MINUTE_MS = 60000
local now = math.floor(now_us() / 1000)
local id, at, action = ARGV[1], tonumber(ARGV[2]), ARGV[6]

redis.call('PEXPIRE', KEYS[1], ARGV[4]) -- first: see abuse_count
local seen = redis.call('GET', KEYS[1])
if seen then
  local before, said, had, lasts = string.match(seen, '^([^\t]+)\t([^\t]+)\t(%d+)\t(%d+)$')
  if before == id then
    return {'again', said, tonumber(had), tonumber(lasts)}
  end
  if before and at < tonumber(string.match(before, '^%d+')) + tonumber(ARGV[3]) then
    return {'known'}
  end
end

local fields = {}
for i = 8, 7 + tonumber(ARGV[7]) do
  fields[#fields + 1] = ARGV[i]
end
local level, ms = 0, 0

local function is_over_the_cap(most)
  local oldest = redis.call('LINDEX', KEYS[7], most - 1)
  return most == 0 or (oldest and now - tonumber(oldest) < MINUTE_MS)
end

local function try_to_ban(subject, rule, first, longest, jitter, most, level_ms, peace_ms)
  local lifted = redis.call('GET', KEYS[5])
  if lifted and at <= tonumber(lifted) + tonumber(peace_ms) then
    return 'lifted'
  end
  level = tonumber(redis.call('GET', KEYS[4]) or '0')
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

if #KEYS > 2 then
  action = try_to_ban(unpack(ARGV, 8 + #fields))
end
redis.call('SET', KEYS[1], table.concat({id, action, plain(level), plain(ms)}, '\t'), 'PX', ARGV[4])
local outcome = {'action', action, 'level', plain(level), 'ban_seconds', plain(ms / 1000)}
for _, part in ipairs(outcome) do
  fields[#fields + 1] = part
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', unpack(fields))
return {'new', action, level, ms}
