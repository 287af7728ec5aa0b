package fanout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"
)

// Config says what a Fan is around. All fields without a default are required.
type Config struct {
	// Storage is upstream's; everything but watches goes there.
	Storage storage.Interface
	// Client is of the shard that holds the resource.
	Client *clientv3.Client
	// Codec, Transformer and Resource are those of Storage.
	Codec       runtime.Codec
	Transformer value.Transformer
	Resource    schema.GroupResource
	// PathPrefix begins all keys, ResourcePrefix those of the resource behind it: "/registry" and "/pods".
	PathPrefix, ResourcePrefix string
	// New makes an empty object, for bookmarks.
	New func() runtime.Object
	// Attrs gives what selectors select by. Default: the predicates' own, asked for each watcher anew.
	Attrs storage.AttrFunc
	// Index names a field by whose value watchers are found that select exactly one, and reads it. Default none.
	Index storage.IndexerFuncs
	// Peek reads the indexed field out of a stored value (what Transformer makes of it) without decoding it; ok = false when it cannot. Default: it cannot.
	Peek func(stored []byte) (value string, ok bool)
	// Select tells whether the labels and fields of a stored value (what Transformer makes of it) are selected, without decoding it; ok = false when it cannot. Default: it
	// cannot.
	Select func(stored []byte, p *storage.SelectionPredicate) (selected, ok bool)
	// Stored gives what encodes an object without decoding it, from its stored value (what Transformer makes of it) and its revision; nil when there is nothing that
	// can. Default: nothing can.
	Stored func(stored []byte, rev int64) Stored
	// Refuse is asked before each watch and may say why there can be none now. Default: it does not.
	Refuse func(context.Context) error
	// Explain makes something that clients understand of the store's errors. Default: they stay as they are.
	Explain func(error) error
	// Walks bounds how many first lists read at once. Share it between Fans. Default: NewWalks(DefaultWalks), its own.
	Walks Walks
	// History bounds the recent events that are kept while there are watchers, in bytes. Default 1 MiB.
	History int
	// Linger is how long a resource that nobody watches any more is watched for those who come back. Default 30 s.
	Linger time.Duration
	// BookmarkEvery is how often those who want bookmarks get one. Default 1 minute, as upstream.
	BookmarkEvery time.Duration
	// Patience is for how long a store without a leader is tried again before all watches end. Default 15 s: elections take one or two.
	Patience time.Duration
	// Logger. Default: nothing.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	if c.Walks == nil {
		c.Walks = NewWalks(DefaultWalks)
	}
	if c.Refuse == nil {
		c.Refuse = func(context.Context) error { return nil }
	}
	if c.Explain == nil {
		c.Explain = func(err error) error { return err }
	}
	if c.History == 0 {
		c.History = 1 << 20
	}
	if c.Linger == 0 {
		c.Linger = 30 * time.Second
	}
	if c.BookmarkEvery == 0 {
		c.BookmarkEvery = time.Minute
	}
	if c.Patience == 0 {
		c.Patience = 15 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports every fault.
func (c *Config) Validate() error {
	var errs []error
	for name, missing := range map[string]bool{"Storage": c.Storage == nil, "Client": c.Client == nil, "Codec": c.Codec == nil,
		"Transformer": c.Transformer == nil, "New": c.New == nil} {
		if missing {
			errs = append(errs, fmt.Errorf("%s is nil", name))
		}
	}
	if !strings.HasPrefix(c.ResourcePrefix, "/") || c.ResourcePrefix == "/" {
		errs = append(errs, fmt.Errorf("ResourcePrefix %q is not a path below /", c.ResourcePrefix))
	}
	if len(c.Index) > 1 {
		errs = append(errs, fmt.Errorf("Index has %d fields; one is supported", len(c.Index)))
	}
	if c.History < 0 || c.Linger < 0 || c.BookmarkEvery < 0 || c.Patience < 0 {
		errs = append(errs, errors.New("History, Linger, BookmarkEvery and Patience must not be negative"))
	}
	if len(errs) > 0 {
		return fmt.Errorf("fan-out of %s: %w", c.Resource, errors.Join(errs...))
	}
	return nil
}

// Stored is an object as it is stored.
type Stored interface {
	// Known tells whether one alike has been decoded, so that this one need not be to know that it can.
	Known() bool
	// Encode gives what an encoder makes of the object; upstream has it do so.
	Encode(id runtime.Identifier, upstream func() ([]byte, error)) ([]byte, error)
}

// Fan is the storage of one resource. See the package comment.
type Fan struct {
	storage.Interface
	cfg    Config
	coder  coder
	prefix string // of all keys: "/registry/pods/"
	field  string // that watchers are indexed by; "" = none
	index  storage.IndexerFunc
	lister *lister

	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup // everything that runs

	mu     sync.Mutex // guards the rest
	closed bool
	hub    *hub // nil when nobody watches
	users  int  // of hub
	linger *time.Timer
}

// New makes a Fan. ctx bounds its life, as Close does.
func New(ctx context.Context, cfg Config) (*Fan, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &Fan{Interface: cfg.Storage, cfg: cfg, coder: coder{cfg.Codec, cfg.Transformer, cfg.Storage.Versioner(), cfg.Stored, cfg.Select}}
	f.prefix = f.absolute(cfg.ResourcePrefix)
	if !strings.HasSuffix(f.prefix, "/") {
		f.prefix += "/"
	}
	for name, get := range cfg.Index {
		f.field, f.index = name, get
	}
	f.life, f.end = context.WithCancel(ctx)
	f.lister = newLister(f)
	return f, nil
}

// Close ends all watches and waits for what runs.
func (f *Fan) Close() {
	f.mu.Lock()
	f.closed = true
	if f.linger != nil {
		f.linger.Stop()
	}
	f.mu.Unlock()
	f.end()
	f.wg.Wait()
}

// absolute is the key in the store of one below the resource's prefix.
func (f *Fan) absolute(key string) string {
	return strings.TrimSuffix(f.cfg.PathPrefix, "/") + "/" + strings.TrimPrefix(key, "/")
}

// begin starts something that Close waits for; false when it is too late.
func (f *Fan) begin(run func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.life.Err() != nil {
		return false
	}
	f.wg.Go(run)
	return true
}

// join gives the hub, for a watcher that knows everything up to a revision. Give it back with leave.
func (f *Fan) join(rev int64) (*hub, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.life.Err() != nil {
		return nil, false
	}
	if f.linger != nil {
		f.linger.Stop()
		f.linger = nil
	}
	if f.hub == nil || f.hub.over() {
		h := newHub(f, rev)
		f.hub, f.users = h, 0
		f.wg.Go(h.run)
	}
	f.users++
	return f.hub, true
}

func (f *Fan) leave(h *hub) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hub != h {
		return // it broke; there is another one
	}
	if f.users--; f.users > 0 || f.closed {
		return
	}
	f.linger = time.AfterFunc(f.cfg.Linger, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.hub == h && f.users == 0 {
			h.stop()
			f.hub = nil
		}
	})
}

// Watch implements storage.Interface.
func (f *Fan) Watch(ctx context.Context, key string, o storage.ListOptions) (watch.Interface, error) {
	prepared, err := storage.PrepareKey(f.cfg.ResourcePrefix, key, o.Recursive)
	if err != nil {
		return nil, err
	}
	rev, err := f.Versioner().ParseResourceVersion(o.ResourceVersion)
	if err != nil {
		return nil, err
	}
	if o.ProgressNotify { // asked for by upstream's cache alone, which is not in use
		return f.Interface.Watch(ctx, key, o)
	}
	if err := f.cfg.Refuse(ctx); err != nil {
		return nil, err
	}
	w := newWatcher(ctx, f, f.absolute(prepared), int64(rev), o)
	if !w.initial && w.start == 0 { // from now on: what is written after this call returned is seen
		if w.start, err = f.lister.current(ctx); err != nil {
			w.cancel()
			return nil, f.cfg.Explain(err)
		}
	}
	if !f.begin(w.run) {
		w.cancel()
		return nil, storage.NewInternalError(errors.New("the server is stopping"))
	}
	return w, nil
}
