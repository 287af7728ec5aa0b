package mvcc

import (
	"context"
	"errors"
	"io"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
)

// use runs f while the store is open.
func (m *Machine) use(f func() error) error {
	select {
	case <-m.opened:
	default:
		return ErrClosed
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return ErrClosed
	}
	return f()
}

// Range reads the local state. Its caller decides whether a read index has to be
// confirmed before. Errors are etcd's, or ErrClosed. The answer may be in memory that the
// context lends (package loan).
func (m *Machine) Range(ctx context.Context, r *pb.RangeRequest) (resp *pb.RangeResponse, err error) {
	err = m.use(func() error {
		var ok bool
		if resp, ok = m.page(ctx, r); ok {
			return nil
		}
		resp, _, err = txn.Range(ctx, m.zap, m.kv, r)
		return err
	})
	return resp, err
}

// ReadTxn executes a transaction that writes nothing on the local state.
func (m *Machine) ReadTxn(ctx context.Context, r *pb.TxnRequest) (resp *pb.TxnResponse, err error) {
	err = m.use(func() error {
		resp, _, err = txn.Txn(ctx, m.zap, r, true, m.kv, m.lessor)
		return err
	})
	return resp, err
}

// Rev is the newest revision, 0 when the store is closed.
func (m *Machine) Rev() (rev int64) {
	_ = m.use(func() error { rev = m.kv.Rev(); return nil })
	return rev
}

// NewWatchStream opens a stream of watches on the store. The stream stays valid
// when a snapshot is installed; it falls silent when the machine is closed.
func (m *Machine) NewWatchStream() (ws etcdmvcc.WatchStream, err error) {
	err = m.use(func() error { ws = m.kv.NewWatchStream(); return nil })
	return ws, err
}

// KeyAt returns a key as it was at a revision, nil if it did not exist or the
// revision is compacted. An error says that it could not be read: ErrClosed, or
// the context's.
func (m *Machine) KeyAt(ctx context.Context, key []byte, rev int64) (kv *mvccpb.KeyValue, err error) {
	err = m.use(func() error {
		r, err := m.kv.Range(ctx, key, nil, etcdmvcc.RangeOptions{Rev: rev})
		if errors.Is(err, etcdmvcc.ErrCompacted) {
			return nil
		}
		if err == nil && len(r.KVs) == 1 {
			kv = &r.KVs[0]
		}
		return err
	})
	return kv, err
}

// Size returns the database's bytes on disk and those in use.
func (m *Machine) Size() (total, used int64) {
	_ = m.use(func() error {
		be := m.backend() // counters only, which a closed one has, too
		total, used = be.Size(), be.SizeInUse()
		return nil
	})
	return total, used
}

// Hash of the whole database.
func (m *Machine) Hash() (hash uint32, rev int64, err error) {
	err = m.use(func() error {
		return m.beside(func(*database) error { hash, rev, err = m.kv.HashStorage().Hash(); return err })
	})
	return hash, rev, err
}

// HashKV of the keys up to a revision (0: the newest). Replicas with the same
// compacted revision have the same.
func (m *Machine) HashKV(rev int64) (hash etcdmvcc.KeyValueHash, current int64, err error) {
	err = m.use(func() error { hash, current, err = m.kv.HashStorage().HashByRev(rev); return err })
	return hash, current, err
}

// Dump writes a consistent image of the database. size is told before the first
// byte is written.
func (m *Machine) Dump(w io.Writer, size func(int64)) error {
	return m.use(func() (err error) {
		var snap backend.Snapshot
		if err := m.beside(func(be *database) error { snap = be.Snapshot(); return nil }); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, snap.Close()) }()
		size(snap.Size())
		_, err = snap.WriteTo(w)
		return err
	})
}

// Commit makes what has been applied durable now.
func (m *Machine) Commit() error {
	return m.use(m.Sync)
}

// PromoteLessor makes this replica the one that expires leases; every lease
// lives on for its full time plus extend, since renewals may have been lost.
func (m *Machine) PromoteLessor(extend time.Duration) { m.lessor.Promote(extend) }

// DemoteLessor undoes PromoteLessor.
func (m *Machine) DemoteLessor() {
	select {
	case <-m.opened:
		m.lessor.Demote()
	default:
	}
}

// ExpiredLeases delivers what has expired while this replica is the primary
// lessor. It must not be used before Opened.
func (m *Machine) ExpiredLeases() <-chan []*lease.Lease { return m.lessor.ExpiredLeasesC() }

// RenewLease returns the renewed time to live in seconds. It works on the
// primary lessor only (lease.ErrNotPrimary) and may wait for a revocation.
func (m *Machine) RenewLease(id int64) (int64, error) {
	select {
	case <-m.opened:
		return m.lessor.Renew(lease.LeaseID(id))
	default:
		return 0, ErrClosed
	}
}

// Lease returns a lease, nil if there is none.
func (m *Machine) Lease(id int64) (l *lease.Lease) {
	_ = m.use(func() error { l = m.lessor.Lookup(lease.LeaseID(id)); return nil })
	return l
}

// Leases returns all leases.
func (m *Machine) Leases() (ls []*lease.Lease) {
	_ = m.use(func() error { ls = m.lessor.Leases(); return nil })
	return ls
}
