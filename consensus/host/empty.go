package host

// WhenEmpty calls f if this node holds no replica of any shard, neither running nor on disk, and lets none start before f returns. It
// tells whether it did. f must not call the Host.
func (h *Host) WhenEmpty(f func()) bool {
	h.op.Lock()
	defer h.op.Unlock()
	if h.ctx.Err() != nil {
		return false
	}
	for _, s := range h.cfg.Shards.Shards() {
		if h.replica(s.ID) != nil || len(h.onDisk(s.ID)) > 0 {
			return false
		}
	}
	f()
	return true
}
