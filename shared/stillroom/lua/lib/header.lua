-- Reads an entry's header line as far as scripts need it (cache/entry.py writes it down). Runs once for each entry that
-- is reclaimed: one pattern, no table.

-- Behind the stamp follow fresh-until, checksum, codec, source and key, and then the tags.
local HEADER = '^1\t(%w+)\t(%d+)\t[^\t\n]*\t[^\t\n]*\t[^\t\n]*\t[^\t\n]*\t[^\t\n]*()'
local BEGINS = 512 -- bytes: more are fetched of a header that is longer
local LAST = tostring(BEGINS - 1) -- once, because to make text of a number costs as much as half a command

-- Returns epoch, stamp, and the tags with a tab in front of each and a newline behind the last; nil for no entry.
local function read_header(key)
  local text = redis.pcall('GETRANGE', key, '0', LAST)
  if type(text) ~= 'string' then
    return nil -- a value that is no string is no entry
  end
  local stop = string.find(text, '\n', 1, true)
  if not stop and #text == BEGINS then
    text = redis.call('GET', key)
    stop = string.find(text, '\n', 1, true)
  end
  local epoch, stamp, tags = string.match(text, HEADER)
  if not stop or not epoch then
    return nil
  end
  return epoch, tonumber(stamp), string.sub(text, tags, stop)
end

-- Returns a function that tells whether this tag is among an entry's tags.
local function is_among(tag)
  local last, another = '\t' .. tag .. '\n', '\t' .. tag .. '\t'
  return function(tags)
    return string.find(tags, last, 1, true) or string.find(tags, another, 1, true)
  end
end
