package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/lni/dragonboat/v4"
)

var nodeHostInfo = dragonboat.NodeHostInfoOption{SkipLogInfo: true}

// loadContacts is empty when nothing is known: it is for people only.
func (h *Host) loadContacts() map[string]time.Time {
	out := map[string]time.Time{}
	b, err := os.ReadFile(filepath.Join(h.cfg.Dir, contactFile))
	if err == nil && json.Unmarshal(b, &out) != nil {
		return map[string]time.Time{}
	}
	return out
}

func writeContacts(path string, seen map[string]time.Time) error {
	b, err := json.Marshal(seen)
	if err != nil {
		return err
	}
	if err := writeSync(path+".tmp", b); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return os.Rename(path+".tmp", path)
}
