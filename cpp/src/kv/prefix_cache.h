// PrefixCache: pages found again by the tokens they hold. A trie of whole pages below a root per
// salt. Pure host arithmetic.
//
// A page enters when its K and V have been computed and are exactly those of dense reading
// (Sequence::clean_len), so that an answer never depends on who ran before. It stays until the pool
// needs room: pages without owners leave in order of last use, the last page of a prefix first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kv/page_pool.h"

namespace tidal {

struct PrefixStats {
  int64_t pages = 0;          // held now, with or without owners
  int64_t lookups = 0;        // calls of Find
  int64_t hits = 0;           // of those, with at least one page
  int64_t lookup_tokens = 0;  // tokens that were looked up
  int64_t hit_tokens = 0;     // of those, found
  int64_t evictions = 0;      // pages dropped for room
};

// What is known of some tokens.
struct PrefixMatch {
  int64_t num_pages = 0;
  int64_t num_idle = 0;  // of those: to own them takes room
};

// The pool must outlive it. A salt is any bytes: sequences with different ones never share. It
// holds whatever K and V depend on beside the tokens: rotary frequencies, whose data it is.
class PrefixCache final : public PageHolder {
 public:
  explicit PrefixCache(PagePool& pool);
  ~PrefixCache() override;
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // Returns the pages of the longest known prefix of the tokens, but for the last token: somebody
  // has to compute what follows it. The caller must own them (SequencePages::Adopt) before anybody
  // takes pages.
  std::vector<int32_t> Find(std::span<const int32_t> tokens, std::string_view salt);

  // Returns what Find would find. Counts as no use of it.
  PrefixMatch Peek(std::span<const int32_t> tokens, std::string_view salt) const;

  // Makes known the whole pages of the tokens, all of them computed and clean; `pages` are those of
  // the sequence, which owns them. Pages whose tokens are known already stay as they are. Without
  // memory for more, it keeps less.
  void Publish(std::span<const int32_t> tokens, std::span<const int32_t> pages,
               std::string_view salt) noexcept;

  // Forgets every prefix that begins with the first page of these tokens: what was computed behind
  // them is of no use.
  void Forget(std::span<const int32_t> tokens, std::string_view salt) noexcept;

  // Forgets all.
  void Clear() noexcept;

  void Evict(int64_t count) noexcept override;

  PrefixStats stats() const;

 private:
  using Tokens = std::vector<int32_t>;  // [page_size]
  // The hash finds a bucket; which page it is, the tokens decide.
  struct TokensHash {
    using is_transparent = void;
    size_t operator()(std::span<const int32_t> tokens) const;
  };
  struct TokensEqual {
    using is_transparent = void;
    bool operator()(std::span<const int32_t> one, std::span<const int32_t> other) const;
  };
  struct Node;
  using NodeIterator = std::list<Node>::iterator;
  using Children = std::unordered_map<Tokens, NodeIterator, TokensHash, TokensEqual>;
  using Roots = std::map<std::string, Children, std::less<>>;
  struct Node {
    int32_t page;
    bool has_parent;
    NodeIterator parent;     // if has_parent
    Roots::iterator root;    // of its prefix
    const Tokens* tokens;    // the key among its siblings
    Children children = {};  // pages that follow it
  };

  // The nodes of the longest known prefix, of at most max_pages pages.
  std::vector<NodeIterator> Walk(std::span<const int32_t> tokens, std::string_view salt,
                                 int64_t max_pages) const;
  std::span<const int32_t> PageOf(std::span<const int32_t> tokens, size_t index) const;
  // Marks a prefix as used just now, its last page first: a page is never older than those behind.
  void Touch(const std::vector<NodeIterator>& path);
  void Insert(std::span<const int32_t> tokens, std::span<const int32_t> pages,
              std::string_view salt);
  // Drops the node and all behind it.
  void Remove(NodeIterator node) noexcept;
  void RemoveLeaf(NodeIterator leaf) noexcept;

  PagePool& pool_;
  std::list<Node> nodes_;  // in order of last use, the oldest first
  Roots roots_;            // those with pages
  PrefixStats stats_;
};

}  // namespace tidal
