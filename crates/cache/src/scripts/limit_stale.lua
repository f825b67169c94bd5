-- A stale copy of something that was just invalidated lives no longer than a reader may be served it.
-- KEYS: stale copy. ARGV: that time in ms.
-- Never longer than it would have: `PEXPIRE … LT` in the words of Redis 6.

if redis.call('PTTL', KEYS[1]) > tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 0
