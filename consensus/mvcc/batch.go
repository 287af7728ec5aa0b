package mvcc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/schema"
)

// A batch is several commands in one entry of the log. Each has its own result, and
// is refused or applied by itself, as if it had an entry of its own.
//
//	version:1 (2) kind:1 (6) (length:uvarint command)*
const (
	batchVersion byte = 2
	kindBatch    Kind = 6
)

// Batch joins encoded commands, at least one, into the content of one entry.
func Batch(cmds [][]byte) []byte {
	if len(cmds) == 1 {
		return cmds[0]
	}
	size := 2
	for _, c := range cmds {
		size += binary.MaxVarintLen32 + len(c)
	}
	b := append(make([]byte, 0, size), batchVersion, byte(kindBatch))
	for _, c := range cmds {
		b = binary.AppendUvarint(b, uint64(len(c)))
		b = append(b, c...)
	}
	return b
}

// split is the inverse of Batch; the parts are of b. The errors are ErrBadCommand -
// nothing of such an entry is applied - and ErrNewerCommand.
func split(b []byte, into [][]byte) ([][]byte, error) {
	if len(b) < 2 || b[0] != batchVersion {
		return append(into, b), nil
	}
	if Kind(b[1]) != kindBatch {
		return nil, fmt.Errorf("%w: kind %d of version %d; upgrade this node", ErrNewerCommand, b[1], b[0])
	}
	for b = b[2:]; len(b) > 0; {
		n, w := binary.Uvarint(b)
		if w <= 0 || n > uint64(len(b)-w) || n > math.MaxInt32 {
			return nil, fmt.Errorf("%w: truncated batch", ErrBadCommand)
		}
		c := b[w : w+int(n)]
		if len(c) >= 2 && (c[0] == batchVersion || Kind(c[1]) == KindLeader || Kind(c[1]) == KindFence) {
			return nil, fmt.Errorf("%w: kind %d in a batch", ErrBadCommand, c[1])
		}
		into = append(into, c)
		b = b[w+int(n):]
	}
	return into, nil
}

// partKey keeps how much of a batch the database holds, when a commit came in the
// middle of it: index of the entry and number of its commands, eight bytes each. It
// counts only while the index is above the applied one.
var partKey = []byte("skein_entry_part")

// part of a batch.
type part struct{ index, commands uint64 }

// applyEntry applies the commands of one entry. The applied index of the database is
// the entry's only with the last one; up to there partKey tells how far it is.
func (m *Machine) applyEntry(ctx context.Context, e *dsm.Entry) error {
	var err error
	if m.parts, err = split(e.Cmd, m.parts[:0]); errors.Is(err, ErrNewerCommand) {
		return err
	} else if err != nil {
		m.log.Error("refused an entry of the log", "error", err)
		m.parts = m.parts[:0]
	}
	defer clear(m.parts)
	var done uint64
	if m.resume.index == e.Index {
		done = m.resume.commands
		m.resume = part{}
	}
	term := m.leader.Load()
	for i, c := range m.parts {
		if uint64(i) < done {
			continue
		}
		if i == len(m.parts)-1 {
			m.index.SetConsistentApplyingIndex(e.Index, term)
		} else {
			m.index.SetConsistentApplyingIndex(e.Index-1, term)
		}
		m.entry.Store(e.Index)
		m.commands.Store(uint64(i) + 1)
		if err := m.apply(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// savePart is part of every commit; the write transaction is locked.
func (m *Machine) savePart(tx backend.UnsafeReadWriter) {
	if m.held.index > m.index.UnsafeConsistentIndex() {
		b := binary.BigEndian.AppendUint64(nil, m.held.index)
		tx.UnsafePut(schema.Meta, partKey, binary.BigEndian.AppendUint64(b, m.held.commands))
	}
}

// loadPart reads where in an entry the database's state is.
func (m *Machine) loadPart(be backend.Backend, applied uint64) error {
	m.resume = part{}
	tx := be.ReadTx()
	tx.RLock()
	_, vs := tx.UnsafeRange(schema.Meta, partKey, nil, 0)
	tx.RUnlock()
	if len(vs) == 0 {
		return nil
	}
	if len(vs[0]) != 16 {
		return errors.New("mvcc: the mark of a half-applied entry is damaged")
	}
	if p := (part{binary.BigEndian.Uint64(vs[0]), binary.BigEndian.Uint64(vs[0][8:])}); p.index > applied {
		m.resume = p
	}
	return nil
}
