package store

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage/value"

	"skein.io/skein/node/api/encrypt"
)

const (
	resealPage = 200 // values read at once
	// resealAgain is how often one object is tried whose value others change at the same moment.
	resealAgain = 8
)

// Usage counts stored values by how they are sealed.
type Usage struct {
	// ByKey has the number of values by the id of the key that they need.
	ByKey map[string]int
	// Plain counts values that should be sealed and are not.
	Plain int
	// Stale counts values that are not as they would be written now.
	Stale int
	// Revisions are those at which each store was read first.
	Revisions map[*clientv3.Client]int64
}

// ResealOptions say what Reseal does.
type ResealOptions struct {
	// All looks at every value of every store; otherwise only at those of resources that are sealed.
	All bool
	// Write makes it write stale values anew; otherwise it counts.
	Write bool
	// Pause is the wait after each write, so that clients are not crowded out.
	Pause time.Duration
	// Progress, if set, is told after each page what has been found so far and how many values have been written.
	Progress func(Usage, int)
}

// Reseal goes through the stored values and writes those anew that are stale: plain ones, ones sealed by an older key. It compares and
// swaps raw values, so nothing but the sealing of an object changes (its resourceVersion does, as by any write). What it has done is in
// the store itself: after an end it can begin again and skips what is done. It returns what it found and how many values it wrote.
func (f *Factory) Reseal(ctx context.Context, o ResealOptions) (Usage, int, error) {
	u, written := Usage{ByKey: map[string]int{}, Revisions: map[*clientv3.Client]int64{}}, 0
	for _, area := range f.areas(o.All) {
		if err := f.resealArea(ctx, area, o, &u, &written); err != nil {
			return u, written, fmt.Errorf("sealed values below %s: %w", area.prefix, err)
		}
	}
	return u, written, nil
}

// area is a range of keys of one store.
type area struct {
	client *clientv3.Client
	prefix string
}

// opening is a resource that this server has opened.
type opening struct {
	area
	resource schema.GroupResource
}

// stores gives each client once.
func (f *Factory) stores() []opened {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.opened)
}

func (f *Factory) areas(all bool) (out []area) {
	if all {
		for _, c := range f.stores() {
			out = append(out, area{c.Client, path.Join("/", f.options.StorageConfig.Prefix) + "/"})
		}
		return out
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.resources {
		if f.transformers.Seals(x.resource) {
			out = append(out, x.area)
		}
	}
	return out
}

// resealArea works through one range. What only counts reads all of it at one revision.
func (f *Factory) resealArea(ctx context.Context, a area, o ResealOptions, u *Usage, written *int) error {
	from, end := a.prefix, clientv3.GetPrefixRangeEnd(a.prefix)
	for {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(resealPage)}
		if from != a.prefix && !o.Write { // writing takes long enough for the revision to be compacted
			opts = append(opts, clientv3.WithRev(u.Revisions[a.client]))
		}
		page, err := a.client.Get(ctx, from, opts...)
		if err != nil {
			return err
		}
		if u.Revisions[a.client] == 0 {
			u.Revisions[a.client] = page.Header.Revision
		}
		for _, kv := range page.Kvs {
			done, err := f.resealOne(ctx, a.client, kv, o, u)
			if err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
			if !done {
				continue
			}
			*written++
			if err := wait(ctx, o.Pause); err != nil {
				return err
			}
		}
		if o.Progress != nil {
			o.Progress(*u, *written)
		}
		if !page.More || len(page.Kvs) == 0 {
			return nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}

func wait(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// errBusy says that an object changed under each of our attempts.
var errBusy = errors.New("others change it all the time")

// resealOne counts one value and, if it is stale and o says so, writes it anew.
func (f *Factory) resealOne(ctx context.Context, c *clientv3.Client, kv *mvccpb.KeyValue, o ResealOptions, u *Usage) (written bool, err error) {
	key := string(kv.Key)
	t, seals := f.transformerOf(key)
	for range resealAgain {
		id, err := encrypt.KeyOf(kv.Value)
		if err != nil {
			return false, err
		}
		if id == "" && !seals {
			return false, nil // plain, and meant to be
		}
		object, stale, err := t.TransformFromStorage(ctx, kv.Value, value.DefaultContext(key))
		if err != nil {
			return false, err
		}
		if !stale || !o.Write {
			u.count(id, stale)
			return false, nil
		}
		sealed, err := t.TransformToStorage(ctx, object, value.DefaultContext(key))
		if err != nil {
			return false, err
		}
		r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision)).
			Then(clientv3.OpPut(key, string(sealed), clientv3.WithIgnoreLease())).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			return false, err
		}
		if r.Succeeded {
			if id, err = encrypt.KeyOf(sealed); seals || id != "" {
				u.count(id, false)
			}
			return true, err
		}
		now := r.Responses[0].GetResponseRange().Kvs
		if len(now) == 0 {
			return false, nil // deleted
		}
		kv = now[0]
	}
	return false, errBusy
}

func (u *Usage) count(id string, stale bool) {
	if id == "" {
		u.Plain++
	} else {
		u.ByKey[id]++
	}
	if stale {
		u.Stale++
	}
}

// transformerOf is the transformer of the resource that a key belongs to, and whether its values are to be sealed. Where no resource is
// known, as of a definition that is gone, what is sealed stays sealed.
func (f *Factory) transformerOf(key string) (t value.Transformer, seals bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	best := -1
	for i, x := range f.resources {
		if strings.HasPrefix(key, x.prefix) && (best < 0 || len(x.prefix) > len(f.resources[best].prefix)) {
			best = i
		}
	}
	if best < 0 {
		return f.transformers.Sealed(), false
	}
	r := f.resources[best].resource
	return f.transformers.TransformerForResource(r), f.transformers.Seals(r)
}
