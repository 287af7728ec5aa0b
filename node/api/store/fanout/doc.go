// Package fanout stands between the store and all who watch it through one API server: however many watch a resource, the store is
// watched once for it, each of its events is decoded once and encoded once per format, and an event wakes those alone whom it may
// concern. Upstream has its watch cache for this, which keeps every object decoded (13 KB a pod); a Fan keeps none. It has the raw
// form of the last few events, for those who come back from a short absence.
//
// A Fan is a storage.Interface around upstream's etcd3 storage, and all but Watch goes there. It promises of watches what
// upstream's storages do:
//
//   - From a resourceVersion: every change of the selected objects after it, in the order of revisions, once. Without one, or from "0":
//     first the objects that there are, as ADDED, in the order of their keys, from one revision of the store that was current during the call. With
//     SendInitialEvents the same, and a bookmark with the annotation k8s.io/initial-events-end behind them; without initial events,
//     changes from now on.
//   - An object that leaves what is selected is DELETED, with its last selected content and the revision of the change; one that enters is ADDED.
//   - Bookmarks, to those who want them, about once a minute and shortly before the end that the context sets.
//   - A revision that the store has compacted, or one not yet reached (with initial events), is answered with an ERROR event, 410 or 504.
//   - Nobody waits for anybody: who leaves more than maxBehind events unread is ended (the channel closes) and may resume from the
//     last that it got.
//   - When the store has no leader for long, or its client ends, all watches end.
//
// The objects of events are shared by all watchers and must not be changed: they are runtime.CacheableObject, which upstream's
// handlers know; GetObject gives a copy. They are decoded when somebody has to see them, and the
// collector takes them as soon as nobody is left who does; nothing here keeps a Secret open.
//
// First lists read the store in pages; those who list the same keys at the same revision share pages, and Walks bounds how many read at once over
// all Fans of a server.
//
// All methods are safe for concurrent use. node/api/store is the only caller.
package fanout
