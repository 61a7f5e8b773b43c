-- Reads an entry's header line as far as scripts need it (cache/entry.py writes it down).

local function read_header(key)
  local text = redis.pcall('GETRANGE', key, 0, 511)
  if type(text) ~= 'string' then
    return nil -- not a string: none of ours
  end
  local stop = string.find(text, '\n', 1, true)
  if not stop and #text == 512 then
    text = redis.call('GET', key)
    stop = string.find(text, '\n', 1, true)
  end
  local epoch, stamp, rest = string.match(text, '^1\t(%w+)\t(%d+)\t()')
  if not stop or not epoch then
    return nil
  end
  return {epoch = epoch, stamp = tonumber(stamp), text = text, rest = rest, stop = stop}
end

-- Behind the stamp follow fresh-until, checksum, codec, source and key, and then the tags.
local function carries_tag(header, tag)
  local at = header.rest
  for _ = 1, 5 do
    local tab = string.find(header.text, '\t', at, true)
    if not tab or tab > header.stop then
      return false
    end
    at = tab + 1
  end
  local tags = '\t' .. string.sub(header.text, at, header.stop - 1) .. '\t'
  return string.find(tags, '\t' .. tag .. '\t', 1, true) ~= nil
end
