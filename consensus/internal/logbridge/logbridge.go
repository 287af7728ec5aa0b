// Package logbridge turns the loggers of the libraries under the store (zap in
// etcd, an interface of its own in dragonboat) into log/slog. What a library
// calls information is debug output for Skein: the store's own packages report
// what an operator should know. Only package consensus/... may call it.
package logbridge

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/lni/dragonboat/v4/logger"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// OrDiscard returns l, or a logger that drops everything when l is nil.
func OrDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// Zap returns a zap logger that writes to l, one level lower for information
// (see the package comment). Fatal entries panic instead of ending the process:
// a stack trace is worth more than a quiet exit. The panic says what the entry
// said, also where the log is discarded.
func Zap(l *slog.Logger) *zap.Logger {
	return zap.New(&core{h: OrDiscard(l).Handler()}, zap.WithFatalHook(fatal{}), zap.WithPanicHook(fatal{}))
}

type fatal struct{}

func (fatal) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	text := e.Message
	for _, a := range attrs(fields) {
		text += fmt.Sprintf("; %s: %v", a.Key, a.Value)
	}
	panic(text)
}

type core struct{ h slog.Handler }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l <= zapcore.InfoLevel:
		return slog.LevelDebug
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

// Enabled is false for debug entries: bbolt makes two of them for every key.
func (c *core) Enabled(l zapcore.Level) bool {
	return l > zapcore.DebugLevel && c.h.Enabled(context.Background(), slogLevel(l))
}

func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}

func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{h: c.h.WithAttrs(attrs(fields))}
}

func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, slogLevel(e.Level), e.Message, 0)
	r.AddAttrs(attrs(fields)...)
	return c.h.Handle(context.Background(), r)
}

func (c *core) Sync() error { return nil }

var (
	raftOnce sync.Once
	raftSink atomic.Pointer[slog.Logger]
)

// Dragonboat sends dragonboat's log to l. Its logger is global to the process
// and its factory can be set once, so the last caller's logger wins; it has to
// be called before the first use of dragonboat.
func Dragonboat(l *slog.Logger) {
	raftSink.Store(OrDiscard(l))
	raftOnce.Do(func() {
		logger.SetLoggerFactory(func(pkg string) logger.ILogger { return raftLogger(pkg) })
	})
}

// raftLogger is the name of the dragonboat package that logs.
type raftLogger string

func (r raftLogger) log(level slog.Level, format string, args []any) {
	l := raftSink.Load()
	if l == nil || !l.Enabled(context.Background(), level) {
		return
	}
	l.Log(context.Background(), level, fmt.Sprintf(format, args...), "library", "dragonboat/"+string(r))
}

func (r raftLogger) SetLevel(logger.LogLevel)     {}
func (r raftLogger) Debugf(f string, args ...any) {}
func (r raftLogger) Infof(f string, args ...any)  { r.log(slog.LevelDebug, f, args) }

// Warningf is debug output too: dragonboat warns of every election step.
func (r raftLogger) Warningf(f string, args ...any) { r.log(slog.LevelDebug, f, args) }

// Errorf of the transport repeats several times a second while a peer is dead,
// which the host reports once.
func (r raftLogger) Errorf(f string, args ...any) {
	if r == "transport" {
		r.log(slog.LevelDebug, f, args)
		return
	}
	r.log(slog.LevelWarn, f, args)
}

func (r raftLogger) Panicf(f string, args ...any) {
	r.log(slog.LevelError, f, args)
	panic(fmt.Sprintf(f, args...))
}
