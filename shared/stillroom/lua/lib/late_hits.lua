-- Changes a log in its midst: hits that are told late, or given back. See hits.
-- include: older_hits

-- Returns how long a log is kept whose name has this longest window, in ms.
local function life_of(keep)
  return plain(keep / 1000 + SLACK_MS)
end

-- `old`: what read_hits gave beside the log.
local function save(key, log, life, old)
  local packed = struct.pack('>' .. string.rep(EACH, #log / 2), unpack(log))
  redis.call('SET', key, (old and pack_older(old, life) or '') .. packed, 'PX', life)
end

-- Where many processes tell of what each admitted by itself, the log of a small quota shares entries too: it would be
-- longer than any log is.
local function put_hits(log, at, count, quota, window)
  local place, slice, floor = #log + 1, window / SLICES, math.floor
  local shares = quota > SLICES or #log > 4 * SLICES
  while place > 1 and log[place - 2] > at do
    place = place - 2
  end
  local before, after = log[place - 2], log[place]
  if shares and before and floor(before / slice) == floor(at / slice) then
    log[place - 2], log[place - 1] = at, math.min(log[place - 1] + count, MOST)
  elseif shares and after and floor(after / slice) == floor(at / slice) then
    log[place + 1] = math.min(log[place + 1] + count, MOST)
  else
    table.insert(log, place, at)
    table.insert(log, place + 1, math.min(count, MOST))
  end
end
