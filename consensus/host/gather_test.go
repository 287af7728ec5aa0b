package host

import (
	"bytes"
	"testing"
)

// TestGather: one proposes for all who came before, in order, and the next one for
// those after; what does not fit goes alone.
func TestGather(t *testing.T) {
	var g gather
	if first, alone := g.join(1, []byte("aa")); !first || alone {
		t.Fatal("nobody proposes")
	}
	for id := uint64(2); id <= 3; id++ {
		if first, alone := g.join(id, []byte("bb")); first || alone {
			t.Fatal("two propose")
		}
	}
	if first, alone := g.join(4, make([]byte, batchBytes)); first || !alone {
		t.Error("a command does not fit and goes with the others")
	}
	others, entry := g.take()
	if len(others) != 2 || others[0] != 2 || others[1] != 3 || !bytes.Contains(entry, []byte("\x02aa\x02bb\x02bb")) {
		t.Fatalf("%d: %x", others, entry)
	}
	large := make([]byte, 2*batchBytes) // alone in its batch it may have any size
	if first, alone := g.join(5, large); !first || alone {
		t.Fatal("nobody proposes after the first batch")
	}
	if others, entry := g.take(); len(others) != 0 || &entry[0] != &large[0] {
		t.Error("a lone command is copied, or has company")
	}
	for id := range uint64(batchCommands) {
		if first, alone := g.join(id, nil); first != (id == 0) || alone {
			t.Fatalf("command %d: %v %v", id, first, alone)
		}
	}
	if _, alone := g.join(1000, nil); !alone {
		t.Error("a batch without bound")
	}
}
